"""What every part uses: files that appear whole, and the host."""
