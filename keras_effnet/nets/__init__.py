"""The networks: tables of all variants, the scaling rule, block builders, CondConv. Knows no weights."""
