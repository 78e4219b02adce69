HEATS = {}
