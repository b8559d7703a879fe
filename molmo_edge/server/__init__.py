"""`molmo-edge serve`: HTTP endpoints of OpenAI's and moondream's APIs for one model (docs/server.md)."""
