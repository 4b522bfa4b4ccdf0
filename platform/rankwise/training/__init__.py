"""Training of packs: many arms over one shared base, each as if it were trained alone."""
