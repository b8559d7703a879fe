"""molmo-edge: Molmo on laptops and Jetsons. `Molmo().ask(image, question)`."""
