"""The commands: each module here adds one with `add_parser(subparsers)`, whose parser's default `run` takes the arguments."""
