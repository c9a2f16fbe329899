"""Where image bytes are, and what they are: folders, zip archives, and reading an image's header."""
