"""The paper's claims, measured: testbeds, what is measured of a seed, and the page that is made of it."""
