"""The command line: parses, calls one verb of the service, and prints; decides nothing itself."""
