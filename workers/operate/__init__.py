"""What an operator asks: check, status, explain, erase, completeness."""
