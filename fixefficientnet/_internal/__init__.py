"""What the package needs and its users do not: files, processes, threads, other libraries' versions."""
