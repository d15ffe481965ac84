"""The checkpoint format, its reader and writer: only safetensors and JSON files, no process group, no pickle."""
