"""How a run is said: YAML files and `key=value` words become one frozen tree."""
