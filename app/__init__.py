"""The findings of one scan in a browser: `medct app`, or a Space."""
