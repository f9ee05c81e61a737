"""tokenizerd: camera frames to SCQ codes and back, over gRPC, REST and WebSocket."""
