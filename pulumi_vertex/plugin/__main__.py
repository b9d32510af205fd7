"""What the engine starts: `python pulumi_vertex/plugin`."""

from pulumi_vertex.provider import main

main()
