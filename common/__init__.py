"""What every part uses: files that appear whole, errors, retries, processes, and the host."""
