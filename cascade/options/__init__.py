"""The options of the command line, in groups; nothing heavy is imported here."""
