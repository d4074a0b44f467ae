"""What more than one test folder needs: daemons, waiting, leak and log checks."""
