"""The units in which the plan counts bytes and operations."""

GB = 1e9
GiB = 2**30
TERA = 1e12
