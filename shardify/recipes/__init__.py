"""What published data sets are made of and where their files lie: one YAML file each, and what reads and checks them."""
