"""State in Redis or Valkey, shared by the workers of many machines."""
