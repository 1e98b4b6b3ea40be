"""Readers, one module per kind of file, found by extension. The protocol is `rayswift.data.sources.Reader`."""
