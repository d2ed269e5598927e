"""What a training would take before it starts: parameters, FLOPs, memory, time and cost."""
