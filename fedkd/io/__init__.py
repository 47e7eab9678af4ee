"""Files and text from elsewhere: locks, JSON lines, text for terminals."""
