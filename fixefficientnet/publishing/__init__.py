"""From finished runs to a repository on the Hub, and to the manifest's rows that load from it."""
