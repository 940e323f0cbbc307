"""``cce`` in common training libraries; each part imports its library only when it is used."""
