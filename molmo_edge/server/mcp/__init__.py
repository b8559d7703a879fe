"""`molmo-edge mcp`: tools that point, count, ask and caption, for agents that speak MCP (docs/mcp.md)."""
