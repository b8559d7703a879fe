"""Models on disk: the hub, configuration files, tensor files, GGUF headers, bundles and their manifest."""
