{{- /* GiB that torch sees on a GPU, by the label nvidia.com/gpu.product that NVIDIA's device plug-in gives a node. */ -}}
{{- define "lt.gpuProducts" -}}
NVIDIA-A100-SXM4-40GB: 39.4
NVIDIA-A100-SXM4-80GB: 79.2
NVIDIA-A100-80GB-PCIe: 79.2
NVIDIA-H100-80GB-HBM3: 79.2
NVIDIA-H100-PCIe: 79.2
NVIDIA-H100-NVL: 93.1
NVIDIA-H20: 95.1
NVIDIA-H200: 139.8
NVIDIA-L4: 22.0
NVIDIA-L40S: 44.4
NVIDIA-A10G: 22.1
NVIDIA-A10: 22.1
NVIDIA-RTX-6000-Ada-Generation: 47.4
{{- end }}

{{- /* engine.gpu.memoryGiB, or what the product has; 0 if neither is known. */ -}}
{{- define "lt.gpuMemory" -}}
{{- $gpu := .Values.engine.gpu -}}
{{- $gpu.memoryGiB | default (get (include "lt.gpuProducts" . | fromYaml) $gpu.product) | default 0.0 -}}
{{- end }}

{{- /* engine.gpu.product's nodes; engine.nodeSelector adds to that, and wins. */ -}}
{{- define "lt.nodeSelector" -}}
{{- $own := dict -}}
{{- with .Values.engine.gpu.product }}{{ $_ := set $own "nvidia.com/gpu.product" . }}{{ end -}}
{{- with mergeOverwrite $own .Values.engine.nodeSelector }}{{ toYaml . }}{{ end -}}
{{- end }}
