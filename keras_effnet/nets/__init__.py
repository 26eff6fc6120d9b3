"""The networks: tables of all variants, the scaling rule, block builders and CondConv layers, without weights."""
