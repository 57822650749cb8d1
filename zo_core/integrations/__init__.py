"""What connects the core to the outside: models, data and the fine-tuning run behind the command line."""
