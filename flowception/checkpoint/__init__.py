"""The checkpoint format and its reading: safetensors and JSON files only, no process group and no pickle."""
