"""What a version is built from, as a CycloneDX bill of materials: base, data, and every installed package.

cyclonedx takes a second to import, so it is imported in the functions that use it.
"""

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from data_contracts.lineage import Lineage
from tasks.data.ingestion.licences import UNKNOWN, distribution_licence

if TYPE_CHECKING:
    from cyclonedx.model.component import Component, ComponentType

_SPACE = uuid.UUID("6f3b8f5e-0c1d-4a57-9f0e-4e5a3c1f7a10")  # ours: the same version gets the same serial number


def sbom(lineage: Lineage) -> str:
    """The bill as JSON, version 1.6 of the standard. The same lineage gives the same bill."""
    from cyclonedx.model.bom import Bom
    from cyclonedx.output.json import JsonV1Dot6

    model = _model(lineage)
    parts = [_base(lineage), _data(lineage), *_packages(lineage)]
    bill = Bom(components=parts, serial_number=uuid.uuid5(_SPACE, lineage.key))
    bill.metadata.component = model
    bill.metadata.timestamp = datetime.fromtimestamp(lineage.made_unix_seconds, UTC)
    bill.register_dependency(model, parts)
    return str(JsonV1Dot6(bill).output_as_string(indent=1))


def _model(lineage: Lineage) -> "Component":
    from cyclonedx.model.component import ComponentType

    sha256 = lineage.training.adapter.sha256
    return _named(ComponentType.MACHINE_LEARNING_MODEL, lineage.name, sha256[:12], sha256, lineage.base_licence)


def _base(lineage: Lineage) -> "Component":
    from cyclonedx.model.component import ComponentType

    base = lineage.base
    version = base.revision or base.digest[:12]
    return _named(ComponentType.MACHINE_LEARNING_MODEL, base.name, version, base.digest, lineage.base_licence)


def _data(lineage: Lineage) -> "Component":
    from cyclonedx.model.component import ComponentType

    data = lineage.data
    name = ", ".join(sorted(data.sources)) or "rows"
    return _named(ComponentType.DATA, name, data.snapshot_id[:12], data.snapshot_id, data.licence)


def _named(kind: "ComponentType", name: str, version: str, sha256: str, licence: str) -> "Component":
    """sha256: of a file, or of what a folder or a snapshot holds."""
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component

    return Component(
        type=kind,
        name=name,
        version=version,
        bom_ref=f"{kind.value}:{name}@{version}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)],
        licenses=[LicenseFactory().make_from_string(licence)],
    )


def _packages(lineage: Lineage) -> Iterator["Component"]:
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model.component import Component
    from packageurl import PackageURL

    licences = LicenseFactory()
    for name, version in lineage.machine.packages.items():
        address = PackageURL("pypi", None, name, version)
        told = distribution_licence(name)
        known = [] if told == UNKNOWN else [licences.make_from_string(told)]
        yield Component(name=name, version=version, bom_ref=str(address), purl=address, licenses=known)
