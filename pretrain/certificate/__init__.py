"""The certificate of a mixer: what every mixer promises, measured one promise at a time."""
