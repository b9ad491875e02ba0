"""The command line: options and output. The work is done by functions of other packages."""
