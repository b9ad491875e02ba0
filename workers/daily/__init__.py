"""One value per person, local day and metric, derived from the stored rows."""
