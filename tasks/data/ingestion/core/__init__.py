"""Pure: chat formats into one conversation, source text into documentation rows."""
