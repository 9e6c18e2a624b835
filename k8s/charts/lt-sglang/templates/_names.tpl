{{- define "lt.name" -}}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{- end }}

{{- define "lt.engine" -}}{{ include "lt.name" . }}-engine{{- end }}
{{- define "lt.gateway" -}}{{ include "lt.name" . }}-gateway{{- end }}

{{- define "lt.picker" -}}{{ include "lt.name" . }}-picker{{- end }}

{{- /* The claim for compiled kernels; empty: there is none. */ -}}
{{- define "lt.compileClaim" -}}
{{- with .Values.compileCache -}}
{{- .existingClaim | default (ternary (printf "%s-kernels" (include "lt.name" $)) "" (ne .size "")) -}}
{{- end -}}
{{- end }}

{{- define "lt.claim" -}}
{{ .Values.modelCache.existingClaim | default (printf "%s-models" (include "lt.name" .)) }}
{{- end }}

{{- /* Labels that never change: a Deployment's selector cannot. Call with (list . "engine"). */ -}}
{{- define "lt.selectorKeys" -}}
app.kubernetes.io/name: lt-sglang, app.kubernetes.io/instance: {{ (index . 0).Release.Name | quote }}, app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "lt.selector" -}}
{ {{- include "lt.selectorKeys" . -}} }
{{- end }}

{{- /* A map of the user's, as keys to put behind others. */ -}}
{{- define "lt.moreKeys" -}}
{{- range $key, $value := . }}, {{ $key | quote }}: {{ $value | quote }}{{ end }}
{{- end }}

{{- /* Not of pods: they change with the chart's version, and every engine would start again for it. */ -}}
{{- define "lt.labelKeys" -}}
{{ include "lt.selectorKeys" . }}, app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}, app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}, helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end }}

{{- /* Call with (list . "engine" labels), where the labels are the user's: _checks.tpl keeps the chart's own apart. */ -}}
{{- define "lt.workloadMeta" -}}
namespace: {{ (index . 0).Release.Namespace | quote }}
labels: { {{- include "lt.labelKeys" . }}{{ include "lt.moreKeys" (index . 2) -}} }
{{- end }}

{{- define "lt.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* An environment variable from a Secret. Call with (list "LT_API_KEY" secret). */ -}}
{{- define "lt.secretEnv" -}}
- name: {{ index . 0 }}
  valueFrom:
    secretKeyRef:
      name: {{ (index . 1).name | quote }}
      key: {{ (index . 1).key | quote }}
{{- end }}

{{- define "lt.meta" -}}
{{ include "lt.workloadMeta" (list (index . 0) (index . 1) dict) }}
{{- end }}

{{- define "lt.image" -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default (index . 0).Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "lt.servedName" -}}{{ .Values.model.servedName | default .Values.model.name | default .Values.model.path | default .Values.model.url }}{{- end }}

{{- /* The last part is the model's own name: by it the known models' lazy layers are found. */ -}}
{{- define "lt.modelPath" -}}
{{ .Values.model.url | default .Values.model.path | default (printf "/models/%s/%s" .Values.model.revision .Values.model.name) }}
{{- end }}

{{- define "lt.downloads" -}}{{ if and .Values.modelCache.download (not .Values.model.path) (not .Values.model.url) }}true{{ end }}{{- end }}
{{- define "lt.marker" -}}{{ include "lt.modelPath" . }}/.complete{{- end }}

{{- define "lt.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "lt.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
