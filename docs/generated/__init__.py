"""What the pages say of what the code itself knows."""
