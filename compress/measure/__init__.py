"""What a network costs, how fast it is, how well two agree, and the report that says so."""
