"""The device mesh and its one sharding table; several processes as one job; signals."""
