"""ControlNets: models whose residuals other models' requests add to their UNet."""
