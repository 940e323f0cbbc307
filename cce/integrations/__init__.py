"""``cce`` in the training libraries people use; each part imports its library only when it is used."""
