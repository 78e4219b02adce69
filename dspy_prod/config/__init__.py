"""One TOML file for a whole service: its LMs, how its programs answer, where traces and log lines go.

`from_config` reads it. What an LM's own arguments mean is `lm.config`'s; how a key is found in the environment is
`lm.environment`'s; here is what stands beside the LMs.
"""
