"""Where config becomes objects; nothing else between the entry points and the engine sees a config."""
