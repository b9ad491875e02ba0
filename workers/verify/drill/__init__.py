"""The drill: a complete stack under load with random faults in its processes, and the totals afterwards."""
