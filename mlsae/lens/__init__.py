"""Find a lens: maps that carry every layer's residuals into the last layer's basis."""
