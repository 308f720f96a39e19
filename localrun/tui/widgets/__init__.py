"""Parts of the chat screen. Each shows what it is given and posts messages; none talks to the engine or the store."""
