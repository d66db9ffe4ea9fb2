"""The Hub: what a push consists of, pushing it, and pulling it again."""
