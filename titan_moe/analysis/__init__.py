"""What is done with runs and checkpoints: inspect, report, sweep."""
