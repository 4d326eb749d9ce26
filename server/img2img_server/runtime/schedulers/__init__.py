"""diffusers' schedulers by name, as linear maps, kept between requests."""
