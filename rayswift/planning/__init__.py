"""Decide, then act: Job + cluster -> Plan. Pure arithmetic; neither torch nor Ray is loaded here."""
